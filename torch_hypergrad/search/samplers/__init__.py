"""Searchers of our own, as samplers of Optuna: one file for each."""

from .coordinate_descent import CoordinateDescent
from .particle_swarm import ParticleSwarm
from .reinforce import Reinforce
from .simulated_annealing import SimulatedAnnealing

__all__ = ["CoordinateDescent", "ParticleSwarm", "Reinforce", "SimulatedAnnealing"]
