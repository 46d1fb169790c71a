"""Settings: dataclasses, flags and YAML, defaults."""
