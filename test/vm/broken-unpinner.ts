/** The backend of a VM with an unpinner that is broken on purpose. */
import { workerData } from "node:worker_threads";
import { Backend } from "../../src/control/backend.ts";
import { openBlindTable } from "../support/blind-table.ts";

new Backend(workerData, openBlindTable).run();
