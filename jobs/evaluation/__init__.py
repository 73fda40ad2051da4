"""The consolidated model at work: loading it, its logits beside training's, what is wrong with its answers."""
