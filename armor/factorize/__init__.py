"""Compress one decoder layer, or round its factors. Choose how: the price of each choice, a budget of bits."""
