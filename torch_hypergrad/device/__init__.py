"""Hardware, and no mathematics: what waits for a device, what is recorded on it, what is moved off it."""
