#!/usr/bin/env bash
# Install this project into the environment that was just made. ARMOR_PIPELINE is set by workflow/rules/common.smk.
set -euo pipefail
pip install --no-deps "$ARMOR_PIPELINE"
