import type { TSchema } from "typebox";
import { Errors } from "typebox/schema";
import { CoiommuError, type Errno, HostError } from "../../base/errors.ts";
import { WorkerEnded } from "../../machine/commands.ts";
import type { Failure } from "./schemas.ts";

type Code = Failure["error"]["code"];

const STATUS: Readonly<Record<Code, number>> = {
  invalid: 400,
  not_found: 404,
  method_not_allowed: 405,
  refused: 409,
  too_large: 413,
  host: 500,
  internal: 500,
  unavailable: 503,
};

/** What a client is told instead of an answer. */
export class Refusal extends Error {
  readonly status: number;
  readonly failure: Failure;

  constructor(code: Code, message: string, more: { field?: string; errno?: Errno } = {}) {
    super(message);
    this.status = STATUS[code];
    this.failure = { error: { code, message, field: more.field ?? null, errno: more.errno ?? null } };
  }

  /** Of what serving a request threw. */
  static of(error: unknown): Refusal {
    if (error instanceof Refusal) return error;
    if (error instanceof WorkerEnded) return new Refusal("unavailable", error.message);
    if (error instanceof HostError) return new Refusal("host", error.message, { errno: error.errno });
    if (error instanceof CoiommuError) return new Refusal("refused", error.message);
    return new Refusal("internal", "internal error, please report it");
  }
}

/** Throws Refusal for a body that is not as `schema` says. */
export function checkBody(schema: TSchema, body: unknown): void {
  const [valid, errors] = Errors(schema, body);
  if (valid) return;
  // Each choice of a union has its say, and a field that is not known is told by the object that it is in.
  const told = errors.filter(({ keyword }) => keyword !== "anyOf" && keyword !== "boolean");
  const { keyword, params, instancePath } = told[0] as {
    keyword: string;
    params: Params;
    instancePath: string;
  };
  const named = params.requiredProperties?.[0] ?? params.additionalProperties?.[0];
  const field = [...instancePath.split("/").slice(1), ...(named === undefined ? [] : [named])].join(".");
  const reason =
    keyword === "required"
      ? "is missing"
      : keyword === "additionalProperties"
        ? "is not known"
        : keyword === "enum"
          ? `must be one of ${params.allowedValues?.join(", ")}`
          : told.flatMap((e) => (e.instancePath === instancePath ? [e.message] : [])).join(" or ");
  throw new Refusal("invalid", `${field || "the body"} ${reason}`, field ? { field } : {});
}

interface Params {
  readonly requiredProperties?: readonly string[];
  readonly additionalProperties?: readonly string[];
  readonly allowedValues?: readonly string[];
}
