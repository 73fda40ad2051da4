"""Refuses a run before it is queued; may import conf, launcher/estimate and launcher/run_folder, never torch."""
