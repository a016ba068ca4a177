"""What an exporter serves besides the metrics: its page, the status as JSON, and the drill."""
