"""The stage that compresses one decoder layer."""
