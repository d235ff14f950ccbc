/** Aliases of models: names for roles, such as `production`, which move from model to model through gates. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ChangeOptions } from "./datasets.js";
import { call, type ListOptions, pages } from "./flows.js";
import { EvaluationService } from "./gen/luthier/v1/evaluation_service_pb.js";
import type { AliasMove, ModelAlias, ModelAliasSchema } from "./gen/luthier/v1/model_alias_pb.js";
import * as names from "./names.js";
import type { CallOptions, Scope } from "./scope.js";

/** Aliases of models. */
export class Aliases {
  constructor(private readonly scope: Scope) {}

  /** Create an alias that stands for no model yet; its `gates` say what an evaluation must show before it moves. */
  create(
    modelAlias: MessageInitShape<typeof ModelAliasSchema>,
    { modelAliasId = "", ...options }: CallOptions & { readonly modelAliasId?: string } = {},
  ): Promise<ModelAlias> {
    const request = { parent: names.project(this.scope.project), modelAlias, modelAliasId };
    return call(this.scope.of(options), EvaluationService.method.createModelAlias, request);
  }

  /** Read one alias; `current.model` is the model that it stands for now. */
  async get(name: string, options: CallOptions = {}): Promise<ModelAlias> {
    return call(this.scope.of(options), EvaluationService.method.getModelAlias, { name: this.name(name) });
  }

  /** Go through the aliases of the project, newest first. */
  list({ signal, ...asked }: ListOptions = {}): AsyncGenerator<ModelAlias, void, undefined> {
    const { listModelAliases } = EvaluationService.method;
    const request = { parent: names.project(this.scope.project), ...asked };
    return pages(this.scope.of({ signal }), listModelAliases, request, (page) => page.modelAliases);
  }

  /**
   * Let an alias stand for a model, if an evaluation of it opens all gates.
   *
   * Throws FailedPrecondition ALIAS_BLOCKED, with the numbers of each gate that is shut, otherwise.
   */
  async move(
    name: string,
    model: string,
    { evaluation = "", etag = "", ...options }: ChangeOptions & { readonly evaluation?: string } = {},
  ): Promise<ModelAlias> {
    const { project } = this.scope;
    return call(this.scope.of(options), EvaluationService.method.moveModelAlias, {
      name: this.name(name),
      model: names.child(project, "models", model),
      evaluation: evaluation && names.child(project, "evaluations", evaluation),
      etag,
    });
  }

  /** Go through the moves of an alias, from the first. */
  moves(
    name: string,
    { signal, pageSize = 0 }: ListOptions = {},
  ): AsyncGenerator<AliasMove, void, undefined> {
    const { listModelAliasMoves } = EvaluationService.method;
    const request = { parent: this.name(name), pageSize };
    return pages(this.scope.of({ signal }), listModelAliasMoves, request, (page) => page.moves);
  }

  /** Delete an alias, with its history. The model that it stands for stays. */
  async delete(name: string, { etag = "", ...options }: ChangeOptions = {}): Promise<ModelAlias> {
    const request = { name: this.name(name), etag };
    return call(this.scope.of(options), EvaluationService.method.deleteModelAlias, request);
  }

  private name(name: string): string {
    return names.alias(this.scope.project, name);
  }
}
