import dev.luthier.v1.ListModelsRequest;
import dev.luthier.v1.ListModelsResponse;
import dev.luthier.v1.Model;
import dev.luthier.v1.ModelServiceGrpc;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.MetadataUtils;
import java.util.concurrent.TimeUnit;

/** Lists the models of a Luthier: java Hello HOST PORT, with the key in LUTHIER_CLIENT_API_KEY. */
public final class Hello {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  private Hello() {}

  public static void main(String[] words) throws InterruptedException {
    ManagedChannel channel =
        NettyChannelBuilder.forAddress(words[0], Integer.parseInt(words[1])).usePlaintext().build();
    try {
      list(channel);
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  private static void list(ManagedChannel channel) {
    Metadata headers = new Metadata();
    headers.put(AUTHORIZATION, "Bearer " + System.getenv("LUTHIER_CLIENT_API_KEY"));
    ModelServiceGrpc.ModelServiceBlockingStub models =
        MetadataUtils.attachHeaders(ModelServiceGrpc.newBlockingStub(channel), headers)
            .withDeadlineAfter(30, TimeUnit.SECONDS);
    ListModelsRequest request = ListModelsRequest.newBuilder().setParent("projects/default").build();
    while (true) {
      ListModelsResponse page = models.listModels(request);
      for (Model model : page.getModelsList()) {
        System.out.println(model.getName() + " " + model.getState());
      }
      if (page.getNextPageToken().isEmpty()) {
        return;
      }
      request = request.toBuilder().setPageToken(page.getNextPageToken()).build();
    }
  }
}
