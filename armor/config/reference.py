"""The reference of the configuration, made from its types: a JSON schema, and the page that people read."""

from __future__ import annotations

import json

from armor.config.run import Config

__all__ = ["json_schema"]


def json_schema() -> str:
    """The JSON schema of a configuration, as indented text."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"
