"""Generated from proto/fastchat_grpc/v1 by `make proto`; never edited."""
