"""The settings of a configuration by topic, and how they are read from YAML."""
