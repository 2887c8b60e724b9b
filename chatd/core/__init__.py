"""The foundation that every other package imports: model, errors, protocol, limits. It does no I/O."""
