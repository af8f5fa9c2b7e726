"""Speed and memory on a real model, against the floor and against other tools."""
