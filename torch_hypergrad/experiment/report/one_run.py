"""The page of one run."""

from __future__ import annotations

import yaml

from .curves import draw_curves, draw_health
from .describe import (
    commands,
    facts,
    headline_numbers,
    in_one_sentence,
    settings_at_bounds,
    surroundings,
    training_sentences,
    values_table,
)
from .examples import draw_augmented, draw_lowest, draw_weights, has_weights, weights_sentences
from .final_values import draw_histograms, draw_layers, draw_schedules
from .groups import table_of_run
from .over_time import draw_over_time
from .page import Page, Section, Table
from .pixels import draw_pixel_maps
from .read import RecordedRun
from .style import Picture
from .trust import doubts, trust_sentences

MAX_ROWS = 12  # of a table that is not folded up


def page_of_run(run: RecordedRun) -> Page:
    """The page of a single run, finished or not."""
    sections = [_training(run), _cleaning(run), _values(run), _augmentation(run), _own(run), _trust(run)]
    return Page(
        title=run.name,
        subtitle=in_one_sentence(run),
        numbers=headline_numbers(run),
        facts=facts(run),
        sections=[section for section in sections if section],
        warnings=doubts(run),
        configuration=yaml.safe_dump(run.config, sort_keys=False),
        commands=commands(run),
        surroundings=surroundings(run),
    )


def _drawn(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture]


def _training(run: RecordedRun) -> Section:
    if not run.results:
        return Section("Training", ["Nothing has been evaluated yet."], _drawn(draw_curves(run)))
    return Section("Training", training_sentences(run), _drawn(draw_curves(run)), [Table(table_of_run(run))])


def _values(run: RecordedRun) -> Section | None:
    pictures = _drawn(draw_over_time(run), draw_schedules(run))
    pictures += [*draw_pixel_maps(run), *draw_layers(run), *_drawn(draw_histograms(run))]
    table = values_table(run)
    if not pictures and table.empty:
        return None
    folded = f"All {len(table)} tuned tensors in numbers" if len(table) > MAX_ROWS else ""
    tables = [Table(table, folded=folded)] if len(table) else []
    return Section("Tuned values", settings_at_bounds(run), pictures, tables)


def _cleaning(run: RecordedRun) -> Section | None:
    if not has_weights(run):
        return None
    title = f"Weights of the training {run.words.examples}"
    return Section(title, weights_sentences(run), _drawn(draw_weights(run), draw_lowest(run)))


def _augmentation(run: RecordedRun) -> Section | None:
    pictures = _drawn(draw_augmented(run))
    return Section("Learned augmentation", (), pictures) if pictures else None


def _own(run: RecordedRun) -> Section | None:
    """The pictures that the task drew itself."""
    files = {run.folder / entry["file"]: entry["caption"] for entry in run.pictures}
    pictures = [
        Picture.of(f"task_{file.stem}", caption, file.read_bytes())
        for file, caption in files.items()
        if file.is_file()
    ]
    return Section("Pictures of the task", (), pictures) if pictures else None


def _trust(run: RecordedRun) -> Section:
    return Section("Is the hypergradient to be trusted?", trust_sentences(run), _drawn(draw_health(run)))
