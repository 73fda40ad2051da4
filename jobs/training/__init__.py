"""What a step computes: loss, optimizer, loss scale, and whether the loss has diverged."""
