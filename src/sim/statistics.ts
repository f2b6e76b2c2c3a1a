/** What happened in a world, to see that it was not spared anything. */
export interface WorldStatistics {
  readonly steps: number;
  readonly maps: number;
  readonly mapsFailed: number;
  readonly pinRequests: number;
  readonly framesPinned: number;
  readonly framesUnpinned: number;
  readonly transfers: number;
  readonly kicksLost: number;
  readonly driverRestarts: number;
  readonly backendDeaths: number;
  readonly machineResets: number;
  readonly operatorOrders: number;
  readonly harvests: number;
  /** Of a device between the table and a domain. */
  readonly moves: number;
  readonly mapRequests: number;
  readonly unmapRequests: number;
  /** How often all RAM got pinned, because no driver was there. */
  readonly allPinned: number;
  readonly balloonReturns: number;
  readonly framesFaulted: number;
  readonly faultsReported: number;
  readonly faultsDropped: number;
  readonly framesNeverTransferred: number;
  readonly framesSpeculative: number;
  readonly speculationSaved: number;
  readonly speculationWasted: number;
  readonly framesBeyondNeed: number;
  readonly mappingsExhausted: number;
}
