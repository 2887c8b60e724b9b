"""What everything else is made of: the model, errors, the protocol, limits. Values only, no I/O."""
