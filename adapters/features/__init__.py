"""The frozen encoder's features: computed once, kept on disk, read ahead."""
