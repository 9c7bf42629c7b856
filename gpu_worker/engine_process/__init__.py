"""The engine's process as the worker sees it: forked, spoken to in frames, watched, ended."""
