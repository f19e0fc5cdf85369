"""Which rank computes which item, so that all of them finish together.

`assign` deals items anew. `rebalance` starts from where they are and moves little. Both give the same answer for the
same numbers in every process, so ranks that know all costs need not talk about it.
"""

from loongforge.data.balance.deal import assign as assign
from loongforge.data.balance.deal import bound as bound
from loongforge.data.balance.deal import rebalance as rebalance
from loongforge.data.balance.plan import StepPlan as StepPlan
from loongforge.data.balance.plan import plan_step as plan_step
