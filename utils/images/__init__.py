"""Where images come from: digits, CIFAR-10 or a folder of one's own, as tensors."""
