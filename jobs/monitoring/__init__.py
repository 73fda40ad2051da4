"""What is measured of a training and where it is written: metrics, step times, slow ranks, traces."""
