"""What all tests share. Plugins live in files of their own."""

pytest_plugins = ["soak_plugin", "tiny_plugin"]
