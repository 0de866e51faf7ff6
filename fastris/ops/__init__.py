"""The operators: one file each with its schema, fake kernel, autograd and choice of back end."""
