"""Lists the models of a Luthier: hello.py [ADDRESS], with the key in LUTHIER_CLIENT_API_KEY."""

import os
import sys

import grpc

from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import ListModelsRequest
from luthier.v1.model_service_pb2_grpc import ModelServiceStub


def main() -> None:
    """Print the name and the state of each model of the project `default`."""
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7602"
    metadata = (("authorization", f"Bearer {os.environ['LUTHIER_CLIENT_API_KEY']}"),)
    request = ListModelsRequest(parent="projects/default")
    with grpc.insecure_channel(address) as channel:
        models = ModelServiceStub(channel)
        while True:
            page = models.ListModels(request, metadata=metadata, timeout=30)
            for model in page.models:
                print(model.name, Model.State.Name(model.state))
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


if __name__ == "__main__":
    main()
