"""Local servers with the APIs that packages are published to. They check what they are sent, and keep it in memory."""
