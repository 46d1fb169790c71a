"""Hold the settings: dataclasses, flags and YAML, defaults."""
