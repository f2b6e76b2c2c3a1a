/**
 * When may what be unpinned: the guest's life, docs/abi.md section 4, as a pure transition function.
 *
 * - undecided: no driver yet. Firmware's window and what devices touch is pinned, nothing is unpinned.
 * - tracked: the table says what is in use.
 * - frozen: the driver has gone, its devices may still write. Nothing is pinned or unpinned.
 * - static: everything is pinned, as without coIOMMU.
 */
export type Life = "undecided" | "tracked" | "frozen" | "static";
export type LifeEvent = "pin-on" | "pin-off" | "device-reset" | "machine-reset";

export function nextLife(life: Life, event: LifeEvent): Life {
  if (event === "machine-reset") return life === "static" ? "static" : "undecided";
  if (event === "pin-on") return "tracked";
  return life === "tracked" ? "frozen" : life;
}
