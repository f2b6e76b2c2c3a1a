import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { LiveGuest } from "../run.ts";
import { openApi } from "./openapi.ts";
import { checkBody, Refusal } from "./refusal.ts";
import { ROUTES, type Route } from "./routes.ts";
import { listenOn } from "./unix-listener.ts";

const BODY_MAX = 64 * 1024;
const CONNECTIONS_MAX = 64;
/** For a client to say all that it wants. */
const REQUEST_MS = 10_000;

/**
 * The control API, HTTP and JSON. It lives in the control thread: what it tells is read from shared memory, what it
 * changes is asked of the backend.
 */
export class ApiServer {
  /** Who is asked about; undefined before, between and after guests. */
  guest: LiveGuest | undefined;
  readonly #server: Server;
  readonly #warn: (text: string) => void;
  readonly #close = () => void this.#server.close();

  private constructor(warn: (text: string) => void) {
    this.#warn = warn;
    this.#server = createServer(
      { requestTimeout: REQUEST_MS, headersTimeout: REQUEST_MS, connectionsCheckingInterval: REQUEST_MS / 4 },
      (request, response) => void this.#serve(request, response),
    );
    this.#server.maxConnections = CONNECTIONS_MAX;
  }

  /** Throws UserError when it cannot serve there. */
  static async listen(path: string, warn: (text: string) => void): Promise<ApiServer> {
    const api = new ApiServer(warn);
    await listenOn(api.#server, path);
    // The socket goes when the process does, however it exits.
    process.once("exit", api.#close);
    return api;
  }

  close(): void {
    process.off("exit", this.#close);
    this.#close();
    this.#server.closeAllConnections();
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const gone = new AbortController();
    response.on("close", () => gone.abort());
    try {
      send(response, 200, await this.#answer(request, response, gone.signal));
    } catch (error) {
      const refusal = Refusal.of(error);
      if (refusal.failure.error.code === "internal") this.#warn(`the API failed: ${(error as Error)?.stack}`);
      send(response, refusal.status, refusal.failure);
    }
  }

  async #answer(request: IncomingMessage, response: ServerResponse, gone: AbortSignal): Promise<unknown> {
    const path = request.url!.split("?", 1)[0]!;
    const methods = SERVED.filter((route) => route.path === path);
    if (methods.length === 0) throw new Refusal("not_found", `there is no ${path}: see /openapi.json`);
    const route = methods.find(({ method }) => method === request.method);
    if (!route) {
      const allowed = methods.map(({ method }) => method).join(", ");
      response.setHeader("allow", allowed);
      throw new Refusal("method_not_allowed", `${path} takes ${allowed}`);
    }
    if (route === DOCUMENT) return openApi(SERVED);
    const body = route.body && parse(await readBody(request, response));
    if (route.body) checkBody(route.body, body);
    if (!this.guest) throw new Refusal("unavailable", "no guest is live now");
    return await route.serve(this.guest, body, gone);
  }
}

const DOCUMENT: Route = {
  ...{ method: "GET", path: "/openapi.json", summary: "This document" },
  answer: { type: "object" },
  serve: () => {},
};
const SERVED = [...ROUTES, DOCUMENT];

function send(response: ServerResponse, status: number, content: unknown): void {
  if (response.destroyed) return;
  response.writeHead(status, { "content-type": "application/json", "cache-control": "no-store" });
  response.end(`${JSON.stringify(content)}\n`);
}

/** What is longer is not read to its end: the connection ends with the answer. */
function readBody(request: IncomingMessage, response: ServerResponse): Promise<Buffer> {
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
  const pieces: Buffer[] = [];
  let length = 0;
  request.on("data", (piece: Buffer) => {
    length += piece.length;
    if (length <= BODY_MAX) {
      pieces.push(piece);
      return;
    }
    request.pause().removeAllListeners("data");
    response.setHeader("connection", "close");
    reject(new Refusal("too_large", `the body is longer than ${BODY_MAX} bytes`));
  });
  request.on("end", () => resolve(Buffer.concat(pieces)));
  request.on("error", reject);
  return promise;
}

function parse(body: Buffer): unknown {
  try {
    return body.length === 0 ? {} : JSON.parse(body.toString());
  } catch (error) {
    throw new Refusal("invalid", `the body is no JSON: ${(error as Error).message}`);
  }
}
