"""The optimisers behind the methods: the proxy loss, this project's solver, the published one, pruning."""
