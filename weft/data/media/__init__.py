"""Pictures, videos and sounds: where their bytes lie, how they are decoded, what encoders read of them."""
