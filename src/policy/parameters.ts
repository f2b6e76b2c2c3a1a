import { UserError } from "../base/errors.ts";

/** What a person may set of a policy. */
export type Parameter =
  | {
      /** A whole number; a part of a whole, "25%" or 0.25; a time in ms, "500ms" or "2s". */
      readonly kind: "count" | "share" | "time";
      readonly default: number;
      readonly min: number;
      readonly max: number;
      readonly summary: string;
    }
  | { readonly kind: "text"; readonly default: string; readonly summary: string };

export type Parameters = Readonly<Record<string, Parameter>>;
/** Counts and shares as numbers, times in ms. They may change while the policy runs. */
export type ValuesOf<P extends Parameters> = {
  readonly [K in keyof P]: P[K] extends { readonly kind: "text" } ? string : number;
};
export type Values = Readonly<Record<string, number | string>>;

type Bounds = readonly [value: number, min: number, max: number];
const numeric =
  <K extends "count" | "share" | "time">(kind: K) =>
  (summary: string, [value, min, max]: Bounds) => ({ kind, default: value, min, max, summary });
/** Value by default, least, most. */
export const count = numeric("count");
export const share = numeric("share");
export const time = numeric("time");
export const text = (summary: string, value: string) => ({ kind: "text", default: value, summary }) as const;

const FORMS = { count: /^(\d+)()$/, share: /^(\d+(?:\.\d+)?)(%?)$/, time: /^(\d+(?:\.\d+)?)(ms|s)$/ };
const SCALES: Readonly<Record<string, number>> = { "": 1, "%": 0.01, ms: 1, s: 1000 };

/** As people write it. */
export function shown(parameter: Parameter, value: number | string): string {
  if (typeof value === "string" || parameter.kind === "count") return String(value);
  if (parameter.kind === "share") return `${Number((100 * value).toFixed(4))}%`;
  return value >= 1000 ? `${value / 1000}s` : `${value}ms`;
}

/** "NAME" or "NAME,key=value,…" -> the name, and what follows it. */
export function splitChoice(choice: string): { readonly name: string; readonly words: readonly string[] } {
  const [name = "", ...words] = choice.split(",");
  return { name, words };
}

/**
 * What `words`, each "key=value", say of `parameters`; by default what those say. `subject` begins a complaint: "--policy
 * clock". Throws UserError.
 */
export function parseValues(parameters: Parameters, words: readonly string[], subject: string): Values {
  const values: Record<string, number | string> = {};
  for (const [key, parameter] of Object.entries(parameters)) values[key] = parameter.default;
  const known = Object.keys(parameters).join(", ");
  for (const word of words) {
    const at = word.indexOf("=");
    const key = at < 0 ? word : word.slice(0, at);
    const parameter = Object.hasOwn(parameters, key) ? parameters[key] : undefined;
    if (!parameter)
      throw new UserError(
        `${subject}: has no parameter "${key}"; ${known ? `it has ${known}` : "it has none"}`,
      );
    values[key] =
      at < 0 ? refuse(parameter, key, subject) : parseValue(parameter, word.slice(at + 1), key, subject);
  }
  return values;
}

function parseValue(parameter: Parameter, value: string, key: string, subject: string): number | string {
  if (parameter.kind === "text") return value === "" ? refuse(parameter, key, subject) : value;
  const match = FORMS[parameter.kind].exec(value);
  // The API gives times and shares as it shows them: as numbers.
  const bare = parameter.kind === "time" && /^\d+(\.\d+)?$/.test(value);
  const n = match ? Number(match[1]) * SCALES[match[2]!]! : bare ? Number(value) : Number.NaN;
  return n >= parameter.min && n <= parameter.max ? n : refuse(parameter, key, subject);
}

function refuse(parameter: Parameter, key: string, subject: string): never {
  const takes =
    parameter.kind === "text"
      ? "a text"
      : `${{ count: "a whole number", share: "a share", time: "a time" }[parameter.kind]} from ` +
        `${shown(parameter, parameter.min)} to ${shown(parameter, parameter.max)}`;
  throw new UserError(`${subject}: ${key} takes ${takes}`);
}
