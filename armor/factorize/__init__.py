"""The stage that compresses one decoder layer, and those that choose how: what each choice costs, a budget of bits."""
