import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestContext } from "node:test";

export interface Answer {
  readonly status: number;
  readonly headers: http.IncomingHttpHeaders;
  readonly body: unknown;
}

/** One HTTP request over a Unix socket; `body` is JSON, or what it is as text. */
export function ask(socketPath: string, method: string, path: string, body?: unknown): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath, method, path, agent: false }, (response) => {
      let text = "";
      response.on("data", (piece) => {
        text += piece;
      });
      response.on("error", reject);
      response.on("end", () => {
        assert.equal(response.headers["content-type"], "application/json");
        resolve({ status: response.statusCode!, headers: response.headers, body: JSON.parse(text) });
      });
    });
    request.on("error", reject);
    request.end(body === undefined || typeof body === "string" ? body : JSON.stringify(body));
  });
}

/** A path for a socket, in a directory that goes with the test. */
export function socketPath(t: TestContext): string {
  const directory = mkdtempSync(join(tmpdir(), "coiommu-api-"));
  t.after(() => rmSync(directory, { recursive: true }));
  return join(directory, "api");
}
