/** A backend that pins nothing in the kernel for a function that no kernel has. */
import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "../../src/control/embedded-backend.ts";
import { counters } from "../../src/memory/counters.ts";
import { TRACKING_COUNTERS } from "../../src/tracking/tracker.ts";

new EmbeddedBackend({ ...workerData, pinner: "software", space: undefined }).run();
// All pins are gone: what is done afterwards finds none.
counters(TRACKING_COUNTERS, workerData.counters).framesNow = 0;
