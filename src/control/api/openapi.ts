import type { Route } from "./routes.ts";
import { Failure } from "./schemas.ts";

const json = (schema: unknown) => ({ "application/json": { schema } });

/** The OpenAPI 3.1 document of `routes`: its schemas are JSON Schema as they are. */
export function openApi(routes: readonly Route[]) {
  const paths: Record<string, Record<string, unknown>> = {};
  for (const { method, path, summary, body, answer } of routes) {
    paths[path] ??= {};
    paths[path][method.toLowerCase()] = {
      summary,
      ...(body && { requestBody: { required: true, content: json(body) } }),
      responses: {
        200: { description: "Done", content: json(answer) },
        default: { $ref: "#/components/responses/Failure" },
      },
    };
  }
  return {
    openapi: "3.1.0",
    info: { title: "coIOMMU control API", version: "1" },
    paths,
    components: {
      responses: {
        Failure: {
          description:
            "Not done: 400 invalid, 404, 405, 409 refused as things are, 413, 500 the host failed, 503 no guest is live",
          content: json(Failure),
        },
      },
    },
  };
}
