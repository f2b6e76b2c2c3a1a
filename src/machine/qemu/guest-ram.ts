import { UserError } from "../../base/errors.ts";
import { FRAME_SIZE } from "../../base/units.ts";
import type { Qmp } from "./qmp.ts";

const GIB = 2 ** 30;
/** As much as `--memory` allows. */
const MAX_BYTES = 2 ** 40;
const SHARED_RAM =
  "-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine …,memory-backend=ram, with SIZE as in -m";

export interface GuestRam {
  readonly memoryMiB: number;
  /** GFNs from this on never are RAM of this machine, not even of memory that is plugged later. */
  readonly frames: number;
}

/** The RAM of a QEMU that somebody else has started. Throws UserError when it is not shared memory. */
export async function guestRam(qmp: Qmp): Promise<GuestRam> {
  const backends = await qmp.execute<{ id?: string; share: boolean }[]>("query-memdev");
  if (backends.length === 0)
    throw new UserError(`this QEMU does not share its guest's RAM: start it with ${SHARED_RAM}`, 1);
  for (const { id, share } of backends) {
    const type = await qmp.execute<string>("qom-get", { path: `/objects/${id}`, property: "type" });
    if (!share || !["memory-backend-memfd", "memory-backend-file"].includes(type))
      throw new UserError(
        `guest RAM "${id}" (${type}, share=${share ? "on" : "off"}) is not shared: start QEMU with ${SHARED_RAM}`,
        1,
      );
  }
  const size = await qmp.execute<{ "base-memory": number; "plugged-memory"?: number }>(
    "query-memory-size-summary",
  );
  const bytes = size["base-memory"] + (size["plugged-memory"] ?? 0);
  const { "max-size": most = bytes, slots = 0 } = await qmp.execute<{ "max-size"?: number; slots?: number }>(
    "qom-get",
    { path: "/machine", property: "memory" },
  );
  // x86: RAM that does not fit below 4 GiB begins there; what is plugged comes after it, each aligned to 1 GiB.
  const end = 4 * GIB + most + (slots + 1) * GIB;
  if (end > MAX_BYTES)
    throw new UserError(`this guest may have ${most / GIB} GiB of RAM; coIOMMU covers less than 1 TiB`, 1);
  return { memoryMiB: bytes / 2 ** 20, frames: end / FRAME_SIZE };
}
