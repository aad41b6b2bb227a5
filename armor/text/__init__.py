"""From a text source to blocks of tokens, for calibration and evaluation."""
