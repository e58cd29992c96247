"""On a path for imports, this hides TensorFlow, which TensorBoard's package loads where it can: that takes seconds."""

raise ImportError("hidden by a test")
