"""Converts training configs of other programs into experiments of Muster, key by key. May import conf and `launcher.check`."""
