"""Language models in torch: load, adapt, generate; without grpc and SQL."""
