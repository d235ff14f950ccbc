// Lists the models of a Luthier: go run . [ADDRESS], with the key in LUTHIER_CLIENT_API_KEY.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	luthier "luthier.dev/gen/luthier/v1"
)

func main() {
	address := "127.0.0.1:7602"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+os.Getenv("LUTHIER_CLIENT_API_KEY"))

	models := luthier.NewModelServiceClient(connection)
	request := &luthier.ListModelsRequest{Parent: "projects/default"}
	for {
		page, err := models.ListModels(ctx, request)
		if err != nil {
			log.Fatal(err)
		}
		for _, model := range page.Models {
			fmt.Println(model.Name, model.State)
		}
		if page.NextPageToken == "" {
			return
		}
		request.PageToken = page.NextPageToken
	}
}
