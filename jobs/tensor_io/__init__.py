"""Where tensors lie in files (DCP, DeepSpeed, safetensors), and reading any range of them; shared by loading,
resuming and merging."""
