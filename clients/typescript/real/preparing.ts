/** What the tests with real services share: records that a tiny model learns by heart, in versions and renderings. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { Split } from "#dist/gen/luthier/v1/dataset_pb.js";
import type { FineTuningJob, FineTuningJobSchema } from "#dist/gen/luthier/v1/fine_tuning_job_pb.js";
import { RenderingKind } from "#dist/gen/luthier/v1/rendering_pb.js";
import { bytesSource, type Client } from "#dist/node.js";

/** A job as a program writes it down. */
type JobInit = Exclude<MessageInitShape<typeof FineTuningJobSchema>, FineTuningJob>;

export const LIMIT = { timeoutSeconds: 240 };
const COLOURS = ["red", "green", "blue"];

export function colour(number: number): string {
  return COLOURS[number % COLOURS.length] ?? "";
}

/** Records of chats about numbered things, a line for each. */
export function chats(count: number, first = 0, answer: (number: number) => string = colour): string {
  return lines(count, first, (number) => ({
    messages: [...question(number), { role: "assistant", content: answer(number) }],
  }));
}

/** Records of a question with a good and a bad answer. */
export function pairs(count: number): string {
  return lines(count, 0, (number) => ({
    prompt: question(number),
    chosen: [{ role: "assistant", content: "blue" }],
    rejected: [{ role: "assistant", content: "grass" }],
  }));
}

/** Records of a question with one answer, every other one a good one. */
export function labelled(count: number): string {
  return lines(count, 0, (number) => ({
    prompt: question(number),
    completion: [{ role: "assistant", content: number % 2 === 1 ? "blue" : "grass" }],
    label: number % 2 === 1,
  }));
}

/** What is asked about a numbered thing. */
export function question(number: number): { role: string; content: string }[] {
  return [{ role: "user", content: `colour of thing ${number}?` }];
}

function lines(count: number, first: number, record: (number: number) => object): string {
  return Array.from({ length: count }, (_, place) => `${JSON.stringify(record(first + place))}\n`).join("");
}

/** Build a version of files by their splits; returns its name. */
export async function version(
  client: Client,
  dataset: string,
  files: readonly (readonly [Split, string])[],
): Promise<string> {
  await client.datasets.create(dataset);
  const sources: { upload: string; split: Split }[] = [];
  for (const [split, text] of files) {
    const source = bytesSource(`${dataset}-${Split[split]}.jsonl`, Buffer.from(text));
    sources.push({ upload: (await client.datasets.upload(source)).name, split });
  }
  const { name } = await client.datasets.createVersion(dataset, sources);
  await client.datasets.versions.wait(name, LIMIT);
  return name;
}

/** Render a version for the model `tiny`; returns the rendering's name. */
export async function rendered(
  client: Client,
  datasetVersion: string,
  kind: RenderingKind = RenderingKind.SUPERVISED,
): Promise<string> {
  const { name } = await client.renderings.create({ datasetVersion, model: "tiny", kind });
  await client.renderings.wait(name, LIMIT);
  return name;
}

/** A job on `tiny` that learns what it is shown. */
export function job(rendering: string, maxSteps: number, settings: JobInit = {}): JobInit {
  return {
    baseModel: "tiny",
    rendering,
    adaptation: { case: "lora", value: { rank: 8 } },
    hyperparameters: {
      maxSteps: BigInt(maxSteps),
      numEpochs: 1000,
      batchSize: { case: "batchRows", value: 8 },
      learningRate: 5e-3,
    },
    ...settings,
  };
}
