"""The network: its parameters, what it keeps of images, where its weights come from."""
