import type { ApiServer } from "../control/api/server.ts";

/** Do `work`, with the API served meanwhile if `--api` says where. */
export async function withApi<T>(
  path: string | undefined,
  warn: (text: string) => void,
  work: (api: ApiServer | undefined) => Promise<T>,
): Promise<T> {
  if (path === undefined) return await work(undefined);
  // Loaded on demand: half of what a command takes to start.
  const { ApiServer: server } = await import("../control/api/server.ts");
  const api = await server.listen(path, warn);
  try {
    return await work(api);
  } finally {
    api.close();
  }
}
