/** Graders, and the names of reward models in them. */

import type { Grader } from "./gen/luthier/v1/grader_pb.js";
import * as names from "./names.js";

/** Give the reward models in a grader, at any depth, their full names. Changes the message. */
export function nameRewardModels(project: string, grader: Grader): void {
  if (grader.kind.case === "rewardModel") {
    const { value } = grader.kind;
    value.model = value.model && names.weights(project, value.model);
  }
  if (grader.kind.case === "multi") {
    for (const inner of Object.values(grader.kind.value.graders)) {
      nameRewardModels(project, inner);
    }
  }
}
