import { UserError } from "../../base/errors.ts";
import type { GuestAgent } from "./agent.ts";

/** Of a piece: seconds of an emulated UART. */
const PIECE = 2 ** 20;
const PIECE_MS_MAX = 120_000;

/** A file of `size` bytes in the guest, in pieces. Throws UserError when it is shorter. */
export async function* readGuestFile(
  agent: GuestAgent,
  path: string,
  size: number,
): AsyncGenerator<Buffer, void> {
  for (let piece = 0; piece * PIECE < size; piece++) {
    const script = `dd if=${path} bs=${PIECE} skip=${piece} count=1 2>/dev/null | base64 -w 0`;
    const { output } = await agent.run(script, { timeoutMs: PIECE_MS_MAX, what: `reading ${path}` });
    const bytes = Buffer.from(output, "base64");
    if (bytes.length !== Math.min(PIECE, size - piece * PIECE))
      throw new UserError(`${path} of the guest arrived damaged`, 1);
    yield bytes;
  }
}
