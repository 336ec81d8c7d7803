"""What processes count, and how they tell Prometheus. Imported only where metrics are asked for."""
