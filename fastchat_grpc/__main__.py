"""`python -m fastchat_grpc`, the same as `fastchat-grpc`."""

from fastchat_grpc.cli import main

if __name__ == "__main__":
    main()
